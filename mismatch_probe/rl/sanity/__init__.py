"""The sanity set: problems that a model solves sometimes, so that RL must be able to learn all of them."""
