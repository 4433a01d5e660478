"""A question, its arms and seeds as DVC experiments, its tables and page."""
