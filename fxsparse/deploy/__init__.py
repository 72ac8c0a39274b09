"""Files for other runtimes: ONNX models and TensorRT engines."""
