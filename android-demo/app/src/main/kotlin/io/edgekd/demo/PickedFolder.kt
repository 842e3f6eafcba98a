package io.edgekd.demo

import android.content.ContentResolver
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import java.io.IOException
import java.io.InputStream

/** A folder behind the system's file picker. */
class PickedFolder(private val resolver: ContentResolver, private val tree: Uri) : Source {
    private val sizes = LinkedHashMap<String, Long>()
    private val places = HashMap<String, Uri>()

    init {
        list(DocumentsContract.getTreeDocumentId(tree), "")
    }

    override fun files(): Map<String, Long> = sizes

    override fun open(name: String): InputStream =
        resolver.openInputStream(places.getValue(name)) ?: throw IOException("$name cannot be opened")

    private fun list(id: String, at: String) {
        val columns = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE, Document.COLUMN_SIZE)
        val folders = ArrayList<Pair<String, String>>()
        resolver.query(DocumentsContract.buildChildDocumentsUriUsingTree(tree, id), columns, null, null, null)?.use { rows ->
            while (rows.moveToNext()) {
                val name = at + rows.getString(1)
                if (rows.getString(2) == Document.MIME_TYPE_DIR) {
                    folders += rows.getString(0) to "$name/"
                } else {
                    sizes[name] = rows.getLong(3)
                    places[name] = DocumentsContract.buildDocumentUriUsingTree(tree, rows.getString(0))
                }
            }
        }
        folders.forEach { (inner, name) -> list(inner, name) }
    }
}
