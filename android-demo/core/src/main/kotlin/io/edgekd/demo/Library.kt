package io.edgekd.demo

import java.io.File
import java.io.IOException
import java.io.InputStream

/** A folder that is somewhere else, such as behind the system's file picker. */
interface Source {
    /** Sizes of its files by their relative names. */
    fun files(): Map<String, Long>

    fun open(name: String): InputStream
}

/** The artifact that the app keeps: it comes whole, checked, or not at all. */
class Library(root: File, private val targets: Set<String>) {
    private val incoming = File(root, "incoming")
    private val place = File(root, "model")

    /** The artifact that is kept, if there is one; what an import that was killed left behind is removed. */
    fun kept(): Artifact? {
        incoming.deleteRecursively()
        return if (place.isDirectory) Artifact.read(place, targets) else null
    }

    /** Copy a folder, compare its files with the manifest, and only then put it in the place of what was kept. */
    fun take(source: Source, freeBytes: Long, onShare: (Double) -> Unit = {}): Artifact {
        incoming.deleteRecursively()
        incoming.mkdirs()
        try {
            copy(source, "manifest.json")
            val artifact = Artifact.read(incoming, targets)
            val sizes = source.files()
            val missing = artifact.manifest.files.keys.firstOrNull { it !in sizes }
            if (missing != null) throw Refusal("file_missing", "$missing is missing.", "Choose the artifact's whole folder.")
            val all = artifact.manifest.files.keys.sumOf { sizes.getValue(it) }
            storageShortage(all, freeBytes)?.let { throw Refusal("storage", it, "Free some, or choose a smaller model.") }
            artifact.manifest.files.keys.forEachIndexed { i, name ->
                copy(source, name)
                onShare((i + 1.0) / artifact.manifest.files.size)
            }
            artifact.checkFiles()
            place.deleteRecursively()
            if (!incoming.renameTo(place)) throw IOException("the folder cannot be renamed")
            return Artifact(place, artifact.manifest)
        } catch (error: IOException) {
            throw Refusal("storage", "The artifact could not be copied: ${error.message}.", "Free storage, and choose it again.")
        } finally {
            incoming.deleteRecursively()
        }
    }

    private fun copy(source: Source, name: String) {
        if (name !in source.files()) return
        val file = File(incoming, name).apply { parentFile!!.mkdirs() }
        source.open(name).use { stream -> file.outputStream().use { stream.copyTo(it) } }
    }
}
