"""ONNX for onnxruntime and onnxruntime-genai."""
