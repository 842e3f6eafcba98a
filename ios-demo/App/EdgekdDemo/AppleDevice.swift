import Darwin
import EdgeCore
import Foundation
import os

/// What Apple's systems tell of the device and this process.
struct AppleDevice: Device {
    let memorySource = "measured:phys_footprint"

    var host: [(String, Json)] {
        let process = ProcessInfo.processInfo
        return [
            ("device", .string(machine)), ("logical_cores", .int(process.processorCount)),
            ("ram_bytes", .int(Int(process.physicalMemory))), ("os", .string(process.operatingSystemVersionString)),
            ("architecture", "arm64"),
        ]
    }

    /// Such as iPhone17,1.
    private var machine: String {
        var system = utsname()
        uname(&system)
        return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }

    var usedBytes: Int? { footprint.map { Int($0.phys_footprint) } }

    var peakBytes: Int? { footprint.map { Int($0.ledger_phys_footprint_peak) } }

    private var footprint: task_vm_info_data_t? {
        var info = task_vm_info_data_t()
        var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
        let status = withUnsafeMutablePointer(to: &info) { pointer in
            pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
            }
        }
        return status == KERN_SUCCESS ? info : nil
    }

    /// A simulator answers 0.
    var availableBytes: Int? {
        let bytes = Int(os_proc_available_memory())
        return bytes > 0 ? bytes : nil
    }

    var freeBytes: Int? {
        let keys: Set<URLResourceKey> = [.volumeAvailableCapacityForImportantUsageKey]
        let values = try? URL.applicationSupportDirectory.resourceValues(forKeys: keys)
        return values?.volumeAvailableCapacityForImportantUsage.map { Int($0) }
    }

    var disturbances: [String] {
        let process = ProcessInfo.processInfo
        let states: [ProcessInfo.ThermalState: String] = [.fair: "fair", .serious: "serious", .critical: "critical"]
        let heat = states[process.thermalState].map { "The device's thermal state was \($0)." }
        return [heat, process.isLowPowerModeEnabled ? "Low Power Mode was on." : nil].compactMap { $0 }
    }
}
