// What Apple's C library and kernel have and Linux's lack; the rest is Linux's, whose structures differ in size alone.
@_exported import Foundation

public typealias natural_t = UInt32
public typealias integer_t = Int32
public typealias mach_msg_type_number_t = natural_t
public typealias task_flavor_t = natural_t
public typealias kern_return_t = Int32
public let KERN_SUCCESS: kern_return_t = 0
public let TASK_VM_INFO: Int32 = 22
public let mach_task_self_: UInt32 = 0
public struct task_vm_info_data_t {
    public var phys_footprint: UInt64 = 0
    public var ledger_phys_footprint_peak: Int64 = 0
    public init() {}
}
public func task_info(
    _ task: UInt32, _ flavor: task_flavor_t, _ info: UnsafeMutablePointer<integer_t>?,
    _ count: UnsafeMutablePointer<mach_msg_type_number_t>?
) -> kern_return_t { 0 }

extension URL {
    public static var applicationSupportDirectory: URL { URL(fileURLWithPath: "/") }
    public static var documentsDirectory: URL { URL(fileURLWithPath: "/") }
    public func startAccessingSecurityScopedResource() -> Bool { true }
    public func stopAccessingSecurityScopedResource() {}
}
extension URLResourceKey {
    public static let volumeAvailableCapacityForImportantUsageKey = URLResourceKey(rawValue: "")
}
extension URLResourceValues { public var volumeAvailableCapacityForImportantUsage: Int64? { nil } }
extension ProcessInfo {
    public enum ThermalState: Int { case nominal, fair, serious, critical }
    public var thermalState: ThermalState { .nominal }
    public var isLowPowerModeEnabled: Bool { false }
}
