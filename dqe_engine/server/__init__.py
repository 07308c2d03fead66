"""`dqe-serve`: the engine behind HTTP. Needs the extra `serve`; `import dqe_engine` loads none of it."""
