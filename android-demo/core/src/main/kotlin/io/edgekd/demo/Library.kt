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

/** The artifact that the app keeps: it comes whole, checked, and signed where there is a public key, or not at all. */
class Library(root: File, private val targets: Set<String>, private val publicKey: String? = null) {
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
            val signed = publicKey?.let { signedNames(source, it) }.orEmpty()
            copy(source, "manifest.json")
            val artifact = Artifact.read(incoming, targets)
            val sizes = source.files()
            val names = artifact.manifest.files.keys + (signed - "manifest.json")
            val missing = names.firstOrNull { it !in sizes }
            if (missing != null) throw Refusal("file_missing", "$missing is missing.", "Choose the artifact's whole folder.")
            val all = names.sumOf { sizes.getValue(it) }
            storageShortage(all, freeBytes)?.let { throw Refusal("storage", it, "Free some, or choose a smaller model.") }
            names.forEachIndexed { i, name ->
                copy(source, name)
                onShare((i + 1.0) / names.size)
            }
            artifact.checkFiles(publicKey)
            place.deleteRecursively()
            if (!incoming.renameTo(place)) throw IOException("the folder cannot be renamed")
            return Artifact(place, artifact.manifest)
        } catch (error: IOException) {
            throw Refusal("storage", "The artifact could not be copied: ${error.message}.", "Free storage, and choose it again.")
        } finally {
            incoming.deleteRecursively()
        }
    }

    /** What a bundle lists, once its signature has been verified. */
    private fun signedNames(source: Source, key: String): Set<String> {
        copy(source, SUMS)
        copy(source, SIGNATURE)
        return SignedBundle.read(incoming, key).names
    }

    private fun copy(source: Source, name: String) {
        if (name !in source.files()) return
        val file = File(incoming, name).apply { parentFile!!.mkdirs() }
        source.open(name).use { stream -> file.outputStream().use { stream.copyTo(it) } }
    }
}
