/// The `q`-th percentile (0 to 100), linear between samples, as edgekd's harness has it.
public func percentile(_ samples: [Double], _ q: Double) -> Double {
    precondition(!samples.isEmpty, "no samples")
    let sorted = samples.sorted()
    let at = Double(sorted.count - 1) * q / 100
    let low = Int(at.rounded(.down))
    let high = Int(at.rounded(.up))
    return sorted[low] + (sorted[high] - sorted[low]) * (at - Double(low))
}

/// The mean of the middle two of an even number.
public func median(_ samples: [Double]) -> Double { percentile(samples, 50) }

public func tokensPerSecond(_ tokens: Int, _ seconds: Double) throws -> Double {
    if seconds <= 0 {
        throw Refusal("clock", "\(tokens) tokens in \(seconds) s: the clock is too coarse.", "Time more tokens.")
    }
    return Double(tokens) / seconds
}
