"""How an op's results are compared, where a tolerance is not enough."""
