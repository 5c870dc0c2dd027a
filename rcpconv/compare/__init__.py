"""`rcpconv compare`: many methods and ablations, one model, one data set, one budget."""
