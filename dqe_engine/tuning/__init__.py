"""What a gallery can be searched by, and what each way costs: exact search, and FAISS's approximate indexes where FAISS is installed."""

from .contenders import Built, Contender, LeftOutError, Setting, early, exact
from .frontier import Measured, measure, recall
from .token_indexes import hnsw, inverted_lists

__all__ = ["Built", "Contender", "LeftOutError", "Measured", "Setting", "early", "exact", "hnsw", "inverted_lists", "measure", "recall"]
