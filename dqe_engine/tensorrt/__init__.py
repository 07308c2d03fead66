"""TensorRT: engines of a bundle found, verified and run. Importing this loads neither TensorRT nor CUDA."""
