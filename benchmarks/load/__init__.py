"""Load for `dqe-serve`: requests made from a seed, clients in closed and open loops, and a server whose time and memory are read."""
