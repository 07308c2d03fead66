"""From a bundle's ONNX graphs to TensorRT engines. Importing this loads neither TensorRT nor torch."""
