// swift-tools-version:6.0
import Foundation
import PackageDescription

// llama.cpp is `llama.xcframework` beside this file (tools/llama-xcframework.sh builds it). On Linux EDGEKD_LLAMA names
// a folder with its `include` and `lib`; without it, the targets that need it are left out.
// ExecuTorch is fetched where EDGEKD_EXECUTORCH is set, and is not asked for where it is not.
let environment = ProcessInfo.processInfo.environment
let executorch = environment["EDGEKD_EXECUTORCH"] != nil

var llama: [Target] = []
var flags: [SwiftSetting] = []
var links: [LinkerSetting] = []
#if os(Linux)
    if let folder = environment["EDGEKD_LLAMA"] {
        llama = [.systemLibrary(name: "llama", path: "Sources/llama")]
        flags = [.unsafeFlags(["-Xcc", "-I\(folder)/include"])]
        links = [.unsafeFlags(["-L\(folder)/lib", "-Xlinker", "-rpath", "-Xlinker", "\(folder)/lib"])]
    }
#else
    llama = [.binaryTarget(name: "llama", path: "llama.xcframework")]
#endif
if !llama.isEmpty {
    llama += [
        .target(name: "EdgeLlama", dependencies: ["EdgeCore", "llama"], swiftSettings: flags, linkerSettings: links),
        .executableTarget(
            name: "drive", dependencies: ["EdgeCore", "EdgeLlama"], swiftSettings: flags, linkerSettings: links),
    ]
}

let fromExecutorch: [Target.Dependency] =
    executorch
    ? ["executorch", "backend_xnnpack", "kernels_llm", "kernels_optimized", "kernels_quantized", "kernels_torchao"].map
    {
        .product(name: $0, package: "executorch")
    } : []

let package = Package(
    name: "edgekd-ios",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(
            name: "EdgeDemo",
            targets: ["EdgeCore", "EdgeCoreML", "EdgeExecuTorch"] + (llama.isEmpty ? [] : ["EdgeLlama"]))
    ],
    dependencies: executorch
        ? [.package(url: "https://github.com/pytorch/executorch", branch: "swiftpm-1.5.1")] : [],
    targets: [
        .target(name: "EdgeCore"),
        .target(name: "EdgeCoreML", dependencies: ["EdgeCore"], swiftSettings: [.swiftLanguageMode(.v5)]),
        .target(
            name: "EdgeExecuTorch", dependencies: ["EdgeCore"] + fromExecutorch,
            swiftSettings: [.swiftLanguageMode(.v5)],
            linkerSettings: executorch ? [.unsafeFlags(["-Wl,-all_load"])] : []),
        .testTarget(name: "EdgeCoreTests", dependencies: ["EdgeCore"]),
    ] + llama
)
