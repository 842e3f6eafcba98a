package io.edgekd.demo

import java.io.File
import java.security.GeneralSecurityException
import java.security.KeyFactory
import java.security.NoSuchAlgorithmException
import java.security.Signature
import java.security.spec.X509EncodedKeySpec
import kotlin.io.encoding.Base64

const val SUMS = "bundle.json"
const val SIGNATURE = "bundle.sig"
private const val BUNDLE_SCHEMA = 1L
private const val MAKE_AGAIN = "Make the bundle again."

/** What stands before the 32 bytes of a public key of Ed25519, for Java to know it as one. */
private val KEY_HEADER = byteArrayOf(0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00)

/** The files that `edgekd bundle` lists, signed by whoever has the app's key. */
class SignedBundle private constructor(private val sums: Map<String, String>, private val sizes: Map<String, Long>) {
    val names: Set<String> get() = sums.keys

    /** Compare the folder with the list. The manifest's own files are compared with the manifest's sums: see `Artifact.checkFiles`. */
    fun check(artifact: Artifact) {
        for ((name, expected) in sums) {
            val file = File(artifact.folder, name)
            if (!file.isFile) throw Refusal("file_missing", "$name is missing.", "Copy the whole bundle.")
            val sum = artifact.manifest.files[name] ?: sha256(file)
            if (sum != expected || file.length() != sizes[name]) {
                throw Refusal("file_changed", "$name is not the file that the bundle lists.", "Copy the bundle again.")
            }
        }
        val there = artifact.folder.walkTopDown().filter { it.isFile }.map { it.relativeTo(artifact.folder).invariantSeparatorsPath }
        val strange = there.firstOrNull { it !in sums && it != SUMS && it != SIGNATURE }
        if (strange != null) throw Refusal("not_listed", "$strange is not in the list of the bundle.", "Remove it, or copy the bundle again.")
    }

    companion object {
        /** The list in a folder, once its signature by `publicKey`, raw and in base64, has been verified. */
        fun read(folder: File, publicKey: String): SignedBundle {
            val (sums, signature) = listOf(SUMS, SIGNATURE).map { File(folder, it) }
            for (file in listOf(sums, signature)) {
                if (!file.isFile) throw Refusal("not_signed", "${file.name} is missing: the app opens signed bundles alone.", "Choose one.")
            }
            val data = sums.readBytes()
            if (!isSigned(data, signature.readText(), publicKey)) {
                throw Refusal("bad_signature", "$SIGNATURE is no signature by the app's key.", "Do not use the bundle.")
            }
            return listed(String(data))
        }

        private fun listed(text: String): SignedBundle {
            val value = try {
                Json.parse(text) as? Map<*, *> ?: throw NotJson("no object")
            } catch (error: NotJson) {
                throw Refusal("not_json", "$SUMS is not JSON: ${error.message}.", MAKE_AGAIN)
            }
            val schema = value["schema_version"] as? Long ?: bad("schema_version")
            if (schema > BUNDLE_SCHEMA) {
                throw Refusal("newer_schema", "$SUMS has schema $schema; this app reads up to $BUNDLE_SCHEMA.", "Update the app.")
            }
            val files = (value["files"] as? Map<*, *> ?: bad("files")).entries.associate { (name, told) -> name as String to told as? Map<*, *> }
            files.keys.firstOrNull { !isInside(it) }?.let { throw Refusal("leaves_folder", "$SUMS lists $it.", MAKE_AGAIN) }
            return SignedBundle(
                files.mapValues { (name, told) -> told?.get("sha256") as? String ?: bad("files.$name") },
                files.mapValues { (name, told) -> told?.get("bytes") as? Long ?: bad("files.$name") },
            )
        }

        private fun bad(key: String): Nothing = throw Refusal("bad_value", "$SUMS: key '$key' is not what a bundle has there.", MAKE_AGAIN)
    }
}

private fun isSigned(data: ByteArray, signature: String, publicKey: String): Boolean = try {
    val key = KeyFactory.getInstance("Ed25519").generatePublic(X509EncodedKeySpec(KEY_HEADER + Base64.decode(publicKey)))
    val verifier = Signature.getInstance("Ed25519")
    verifier.initVerify(key)
    verifier.update(data)
    verifier.verify(Base64.decode(signature.trim()))
} catch (error: NoSuchAlgorithmException) {
    throw Refusal("no_ed25519", "This device cannot verify Ed25519 signatures.", "Update it: Android can since version 13.")
} catch (error: GeneralSecurityException) {
    false
} catch (error: IllegalArgumentException) { // no base64
    false
}
