package io.edgekd.demo

import java.io.File

/** What Linux, and so Android, tells of this process in /proc. */
open class ProcDevice : Device {
    override fun host(): Map<String, Any?> = mapOf(
        "logical_cores" to Runtime.getRuntime().availableProcessors(),
        "os" to "${System.getProperty("os.name")} ${System.getProperty("os.version")}",
        "architecture" to System.getProperty("os.arch"),
    )

    override fun rssBytes(): Long? = status("VmRSS")

    override fun peakRssBytes(): Long? = status("VmHWM")

    override fun currentMicroampere(): Long? = null

    override fun temperatureC(): Double? = null

    private fun status(key: String): Long? = runCatching {
        val line = File("/proc/self/status").readLines().first { it.startsWith("$key:") }
        line.filter { it.isDigit() }.toLong() * 1024
    }.getOrNull()
}
