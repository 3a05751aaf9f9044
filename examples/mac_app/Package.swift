// swift-tools-version: 5.9
// Not compiled by this project's tests where no Swift toolchain is; see docs/EMBEDDING.md.

import PackageDescription

var targets: [Target] = [
    .target(name: "MixtralKit"),
    .testTarget(
        name: "MixtralKitTests",
        dependencies: ["MixtralKit"],
        resources: [.copy("Fixtures")]
    ),
]
var products: [Product] = [.library(name: "MixtralKit", targets: ["MixtralKit"])]

#if os(macOS)
// The app needs SwiftUI; the library builds and is tested on Linux too.
targets.append(.executableTarget(name: "MixtralApp", dependencies: ["MixtralKit"]))
products.append(.executable(name: "MixtralApp", targets: ["MixtralApp"]))
#endif

let package = Package(
    name: "MixtralKit",
    platforms: [.macOS(.v14)],
    products: products,
    targets: targets
)
