package io.edgekd.demo

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager
import android.os.Build

/** What Android tells of the phone and this process. */
class AndroidDevice(private val context: Context) : ProcDevice() {
    private val memory: ActivityManager.MemoryInfo
        get() = ActivityManager.MemoryInfo().also {
            (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(it)
        }

    /** What can be taken before Android begins to end apps. */
    fun availableBytes(): Long = memory.availMem - memory.threshold

    override fun host(): Map<String, Any?> = super.host() + mapOf(
        "device" to "${Build.MANUFACTURER} ${Build.MODEL}",
        "cpu" to Build.HARDWARE,
        "ram_bytes" to memory.totalMem,
        "os" to "Android ${Build.VERSION.RELEASE}",
        "architecture" to Build.SUPPORTED_ABIS.firstOrNull(),
    )

    /** Zero and the least number are what phones answer that do not measure it. */
    override fun currentMicroampere(): Long? {
        val battery = context.getSystemService(Context.BATTERY_SERVICE) as BatteryManager
        return battery.getLongProperty(BatteryManager.BATTERY_PROPERTY_CURRENT_NOW).takeIf { it != 0L && it != Long.MIN_VALUE && it != Int.MIN_VALUE.toLong() }
    }

    /** Of the battery: what is in tenths of a degree in Android's broadcast. */
    override fun temperatureC(): Double? {
        val battery = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))
        return battery?.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Int.MIN_VALUE)?.takeIf { it != Int.MIN_VALUE }?.div(10.0)
    }
}
