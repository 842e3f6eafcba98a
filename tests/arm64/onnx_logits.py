"""An ONNX decoder in onnxruntime, for a Python that has that and NumPy alone. Arguments: see windows.h."""

import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is imported
import numpy as np
import onnxruntime

PAST = "past_key_values"
model, ids_path, window, begin, out_path = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
inputs = {node.name: node for node in session.get_inputs()}
pasts = [node for node in inputs.values() if node.name.startswith(PAST)]
outputs = ["logits", *(node.name.replace(PAST, "present", 1) for node in pasts)]
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
empty = [np.empty((1, node.shape[1], 0, node.shape[3]), types[node.type]) for node in pasts]

with open(out_path, "wb") as out:
    for ids in np.fromfile(ids_path, np.int32).reshape(-1, int(window)):
        cache = empty
        for piece in np.split(ids, range(int(begin), len(ids))):
            used, end = cache[0].shape[2], cache[0].shape[2] + len(piece)
            given = {"input_ids": piece[None].astype(np.int64), "attention_mask": np.ones((1, end), np.int64)}
            if "position_ids" in inputs:
                given["position_ids"] = np.arange(used, end)[None]
            given |= {node.name: past for node, past in zip(pasts, cache, strict=True)}
            logits, *cache = session.run(outputs, given)
            out.write(logits[0, -1].astype(np.float32).tobytes())
