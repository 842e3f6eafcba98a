package io.edgekd.demo

/** The `q`-th percentile (0 to 100), linear between samples, as edgekd's harness has it. */
fun percentile(samples: List<Double>, q: Double): Double {
    require(samples.isNotEmpty()) { "no samples" }
    val sorted = samples.sorted()
    val at = (sorted.size - 1) * q / 100
    val low = Math.floor(at).toInt()
    val high = Math.ceil(at).toInt()
    return sorted[low] + (sorted[high] - sorted[low]) * (at - low)
}

/** The mean of the middle two of an even number. */
fun median(samples: List<Double>): Double = percentile(samples, 50.0)

fun tokensPerSecond(tokens: Int, seconds: Double): Double {
    if (seconds <= 0) throw Refusal("clock", "$tokens tokens in $seconds s: the clock is too coarse.", "Time more tokens.")
    return tokens / seconds
}
