package io.edgekd.demo

/** Room for the runtime itself, its work buffers and the app. */
private const val RUNTIME_BYTES = 96L shl 20

/** Bytes that the artifact takes when it is loaded with a full cache. */
fun requiredBytes(manifest: Manifest, modelBytes: Long): Long = modelBytes + (manifest.cacheBytes ?: 0) + RUNTIME_BYTES

/** A sentence with the numbers where memory is short, else null. */
fun memoryShortage(manifest: Manifest, modelBytes: Long, availableBytes: Long): String? {
    val required = requiredBytes(manifest, modelBytes)
    if (required <= availableBytes) return null
    return "The model needs ${mib(required)} of memory (${mib(modelBytes)} of weights, the cache of " +
        "${manifest.contract.contextLength} tokens and the runtime); there are ${mib(availableBytes)}."
}

/** A sentence where a folder does not fit the storage, else null. */
fun storageShortage(bytes: Long, freeBytes: Long): String? =
    if (bytes <= freeBytes) null else "The artifact has ${mib(bytes)}; the storage has ${mib(freeBytes)} left."

private fun mib(bytes: Long): String = "${(bytes + (1 shl 20) - 1) shr 20} MiB"
