// The messages between an app and the helper, as mixtral_mlx/helper/schema.json has them.

import Foundation

/// The protocol this client speaks; the helper's `hello` says its own.
public let protocolVersion = 1

// MARK: - From the helper

/// The first line.
public struct Hello: Codable, Equatable, Sendable {
    public var `protocol`: Int
    public var version: String
    public var pid: Int
}

/// How far a model has come: fetched from its repository first ("fetching"), where it is not here, then into memory.
public struct Loading: Codable, Equatable, Sendable {
    public var id: String?
    public var model: String
    public var phase: String?
    public var doneBytes: Int
    public var totalBytes: Int

    enum CodingKeys: String, CodingKey {
        case id, model, phase
        case doneBytes = "done_bytes"
        case totalBytes = "total_bytes"
    }
}

/// Where the HTTP API is, and the key it asks for.
public struct Serving: Codable, Equatable, Sendable {
    public var url: String
    public var key: String
}

/// A model is in memory.
public struct Ready: Codable, Equatable, Sendable {
    public var id: String?
    public var model: String
    public var folder: String
    public var context: Int
    public var budgetBytes: Int
    public var weightsBytes: Int
    public var loadSeconds: Double
    public var serving: Serving?

    enum CodingKeys: String, CodingKey {
        case id, model, folder, context, serving
        case budgetBytes = "budget_bytes"
        case weightsBytes = "weights_bytes"
        case loadSeconds = "load_seconds"
    }
}

/// What has become of the model without being asked.
public struct ModelState: Codable, Equatable, Sendable {
    public var state: String
}

/// How far a prompt has been read.
public struct PromptProgress: Codable, Equatable, Sendable {
    public var id: String
    public var choice: Int
    public var done: Int
    public var total: Int
    public var cached: Int
}

/// A token that might have come.
public struct Alternative: Codable, Equatable, Sendable {
    public var id: Int
    public var text: String
    public var logprob: Double
}

/// A token and how likely it was.
public struct TokenScore: Codable, Equatable, Sendable {
    public var id: Int
    public var text: String
    public var logprob: Double
    public var topLogprobs: [Alternative]

    enum CodingKeys: String, CodingKey {
        case id, text, logprob
        case topLogprobs = "top_logprobs"
    }
}

/// More of an answer's text.
public struct TextDelta: Codable, Equatable, Sendable {
    public var id: String
    public var choice: Int
    public var text: String
    public var tokens: [TokenScore]?
}

/// More of a tool call: first its id and name, then its arguments' JSON text in parts.
public struct ToolCallDelta: Codable, Equatable, Sendable {
    public var id: String
    public var choice: Int
    public var call: Int
    public var callID: String
    public var name: String
    public var arguments: String

    enum CodingKeys: String, CodingKey {
        case id, choice, call, name, arguments
        case callID = "call_id"
    }
}

public struct Usage: Codable, Equatable, Sendable {
    public var promptTokens: Int
    public var completionTokens: Int
    public var cachedTokens: Int

    enum CodingKeys: String, CodingKey {
        case promptTokens = "prompt_tokens"
        case completionTokens = "completion_tokens"
        case cachedTokens = "cached_tokens"
    }
}

/// Seconds, of the slowest choice.
public struct Timings: Codable, Equatable, Sendable {
    public var queued: Double
    public var prompt: Double
    public var generation: Double
}

/// An answer has ended; there is a reason for each choice.
public struct Done: Codable, Equatable, Sendable {
    public var id: String
    public var finishReasons: [String]
    public var usage: Usage
    public var seconds: Timings

    enum CodingKeys: String, CodingKey {
        case id, usage, seconds
        case finishReasons = "finish_reasons"
    }
}

/// What was asked is done.
public struct Acknowledgement: Codable, Equatable, Sendable {
    public var id: String
}

/// How the helper is. Of what the engine counts only that is read here which an app shows.
public struct Stats: Codable, Equatable, Sendable {
    public var id: String
    public var state: String
    public var running: Int
    public var queued: Int
    public var processBytes: Int
    public var logLinesDropped: Int
    public var memory: [String: Int]?

    enum CodingKeys: String, CodingKey {
        case id, state, running, queued, memory
        case processBytes = "process_bytes"
        case logLinesDropped = "log_lines_dropped"
    }
}

/// What went wrong: `code` is stable; `retryable` says whether the same may well succeed later.
public struct HelperError: Error, Codable, Equatable, Sendable {
    public var id: String?
    public var lineID: String?
    public var code: String
    public var message: String
    public var hint: String
    public var param: String?
    public var retryable: Bool

    enum CodingKeys: String, CodingKey {
        case id, code, message, hint, param, retryable
        case lineID = "line_id"
    }

    public init(code: String, message: String, hint: String = "", retryable: Bool = false) {
        self.id = nil
        self.lineID = nil
        self.code = code
        self.message = message
        self.hint = hint
        self.param = nil
        self.retryable = retryable
    }
}

extension HelperError: LocalizedError {
    public var errorDescription: String? { message }
    public var recoverySuggestion: String? { hint.isEmpty ? nil : hint }
}

/// The last line, and why.
public struct Bye: Codable, Equatable, Sendable {
    public var reason: String
}

/// A line from the helper.
public enum Message: Equatable, Sendable {
    case hello(Hello)
    case loading(Loading)
    case ready(Ready)
    case state(ModelState)
    case prompt(PromptProgress)
    case text(TextDelta)
    case toolCall(ToolCallDelta)
    case done(Done)
    case ok(Acknowledgement)
    case stats(Stats)
    case error(HelperError)
    case bye(Bye)
    /// A later helper may say more than this client knows.
    case unknown(type: String)

    /// The request it belongs to.
    public var id: String? {
        switch self {
        case .loading(let message): return message.id
        case .ready(let message): return message.id
        case .prompt(let message): return message.id
        case .text(let message): return message.id
        case .toolCall(let message): return message.id
        case .done(let message): return message.id
        case .ok(let message): return message.id
        case .stats(let message): return message.id
        case .error(let message): return message.id
        case .hello, .state, .bye, .unknown: return nil
        }
    }

    /// Whether nothing more comes for the request.
    public var isEnd: Bool {
        switch self {
        case .ready, .done, .ok, .stats, .error: return true
        case .hello, .loading, .state, .prompt, .text, .toolCall, .bye, .unknown: return false
        }
    }
}

extension Message: Decodable {
    private enum TypeKey: String, CodingKey {
        case type
    }

    public init(from decoder: Decoder) throws {
        let type = try decoder.container(keyedBy: TypeKey.self).decode(String.self, forKey: .type)
        switch type {
        case "hello": self = .hello(try Hello(from: decoder))
        case "loading": self = .loading(try Loading(from: decoder))
        case "ready": self = .ready(try Ready(from: decoder))
        case "state": self = .state(try ModelState(from: decoder))
        case "prompt": self = .prompt(try PromptProgress(from: decoder))
        case "text": self = .text(try TextDelta(from: decoder))
        case "tool_call": self = .toolCall(try ToolCallDelta(from: decoder))
        case "done": self = .done(try Done(from: decoder))
        case "ok": self = .ok(try Acknowledgement(from: decoder))
        case "stats": self = .stats(try Stats(from: decoder))
        case "error": self = .error(try HelperError(from: decoder))
        case "bye": self = .bye(try Bye(from: decoder))
        default: self = .unknown(type: type)
        }
    }
}

// MARK: - To the helper

/// A message of a conversation.
public struct ChatMessage: Codable, Equatable, Sendable {
    public var role: String
    public var content: String

    public init(role: String, content: String) {
        self.role = role
        self.content = content
    }
}

/// What is asked: the fields of OpenAI's chat completions that this client uses. More may be added in the same way.
public struct ChatBody: Codable, Equatable, Sendable {
    public var messages: [ChatMessage]
    public var maxTokens: Int?
    public var minTokens: Int?
    public var temperature: Double?
    public var topP: Double?
    public var seed: Int?
    public var stop: [String]?

    enum CodingKeys: String, CodingKey {
        case messages, temperature, seed, stop
        case maxTokens = "max_tokens"
        case minTokens = "min_tokens"
        case topP = "top_p"
    }

    public init(
        messages: [ChatMessage], maxTokens: Int? = nil, minTokens: Int? = nil, temperature: Double? = nil,
        topP: Double? = nil, seed: Int? = nil, stop: [String]? = nil
    ) {
        self.messages = messages
        self.maxTokens = maxTokens
        self.minTokens = minTokens
        self.temperature = temperature
        self.topP = topP
        self.seed = seed
        self.stop = stop
    }
}

/// How a model is loaded; what is nil is as the helper was started.
public struct LoadOptions: Equatable, Sendable {
    public var memory: String?
    public var context: Int?
    public var idleUnloadSeconds: Double?
    public var cacheFolder: String?
    public var offline: Bool?

    public init(
        memory: String? = nil, context: Int? = nil, idleUnloadSeconds: Double? = nil, cacheFolder: String? = nil,
        offline: Bool? = nil
    ) {
        self.memory = memory
        self.context = context
        self.idleUnloadSeconds = idleUnloadSeconds
        self.cacheFolder = cacheFolder
        self.offline = offline
    }
}

/// How short of memory the system is, as macOS counts.
public enum PressureLevel: Int, Codable, Sendable {
    case normal = 1
    case warning = 2
    case critical = 4
}

/// A line to the helper.
public enum Command: Equatable, Sendable {
    case load(id: String, model: String, options: LoadOptions)
    case chat(id: String, body: ChatBody)
    case cancel(id: String, request: String)
    case unload(id: String)
    case memoryPressure(id: String, level: PressureLevel)
    case stats(id: String)
    case shutdown(id: String)

    /// The line, with its end.
    public func line() throws -> Data {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        var data = try encoder.encode(self)
        data.append(0x0A)
        return data
    }
}

extension Command: Encodable {
    private enum CodingKeys: String, CodingKey {
        case type, id, model, body, request, level, memory, context, offline
        case idleUnloadSeconds = "idle_unload_s"
        case cacheFolder = "cache_dir"
    }

    public func encode(to encoder: Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        switch self {
        case .load(let id, let model, let options):
            try fields.encode("load", forKey: .type)
            try fields.encode(id, forKey: .id)
            try fields.encode(model, forKey: .model)
            try fields.encodeIfPresent(options.memory, forKey: .memory)
            try fields.encodeIfPresent(options.context, forKey: .context)
            try fields.encodeIfPresent(options.idleUnloadSeconds, forKey: .idleUnloadSeconds)
            try fields.encodeIfPresent(options.cacheFolder, forKey: .cacheFolder)
            try fields.encodeIfPresent(options.offline, forKey: .offline)
        case .chat(let id, let body):
            try fields.encode("chat", forKey: .type)
            try fields.encode(id, forKey: .id)
            try fields.encode(body, forKey: .body)
        case .cancel(let id, let request):
            try fields.encode("cancel", forKey: .type)
            try fields.encode(id, forKey: .id)
            try fields.encode(request, forKey: .request)
        case .unload(let id):
            try fields.encode("unload", forKey: .type)
            try fields.encode(id, forKey: .id)
        case .memoryPressure(let id, let level):
            try fields.encode("memory_pressure", forKey: .type)
            try fields.encode(id, forKey: .id)
            try fields.encode(level, forKey: .level)
        case .stats(let id):
            try fields.encode("stats", forKey: .type)
            try fields.encode(id, forKey: .id)
        case .shutdown(let id):
            try fields.encode("shutdown", forKey: .type)
            try fields.encode(id, forKey: .id)
        }
    }
}
