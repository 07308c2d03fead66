"""Export of a DQE-CIR checkpoint to ONNX graphs and a verified bundle for the runtime."""
