#!/usr/bin/env python3
"""Align the stored entries of a ZIP file for pages of 16 KB: align.py FROM TO. zipalign does it too, but apksigner
moves its entries to 4 KB again, unless each says its alignment in the extra field that Android gave the number
0xd935."""

import struct
import sys
import zipfile

PAGE = 16384

with zipfile.ZipFile(sys.argv[1]) as source, zipfile.ZipFile(sys.argv[2], "w") as target:
    for entry in source.infolist():
        entry.extra = b""
        if entry.compress_type == zipfile.ZIP_STORED:
            page = PAGE if entry.filename.endswith(".so") else 4
            begin = target.fp.tell() + 30 + len(entry.filename.encode()) + 6
            entry.extra = struct.pack("<HHH", 0xD935, 2 + -begin % page, page) + bytes(-begin % page)
        target.writestr(entry, source.read(entry))
