// A chat window on a helper. Not run by this project's tests, which have no Mac.

import MixtralKit
import SwiftUI

@main
@MainActor
struct MixtralApp: App {
    @State private var chat = ChatModel()

    var body: some Scene {
        WindowGroup("Mixtral") {
            ContentView(chat: chat)
                .frame(minWidth: 360, minHeight: 400)
                .task { await chat.run() }
        }
    }
}

@MainActor
struct ContentView: View {
    @Bindable var chat: ChatModel

    var body: some View {
        VStack(spacing: 0) {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(chat.turns) { turn in
                        VStack(alignment: .leading, spacing: 2) {
                            Text(turn.role == "user" ? "You" : "Mixtral").font(.caption).foregroundStyle(.secondary)
                            // Verbatim: text of a model is never taken for Markdown, links or keys.
                            Text(verbatim: turn.content).textSelection(.enabled)
                        }
                        .accessibilityElement(children: .combine)
                    }
                }
                .frame(maxWidth: .infinity, alignment: .leading)
                .padding()
            }
            .defaultScrollAnchor(.bottom)
            Divider()
            Text(chat.status).font(.caption).foregroundStyle(.secondary).padding(.top, 6)
            HStack {
                TextField("Message", text: $chat.draft, axis: .vertical)
                    .onSubmit { chat.send() }
                if chat.isAnswering {
                    Button("Stop") { chat.stopAnswering() }.keyboardShortcut(".", modifiers: .command)
                } else {
                    Button("Send") { chat.send() }.disabled(!chat.canSend)
                }
            }
            .padding()
        }
    }
}
