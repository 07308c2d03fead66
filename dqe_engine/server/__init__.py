"""An HTTP service over one engine: `dqe-serve`."""
