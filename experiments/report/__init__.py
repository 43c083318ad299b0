"""What runs and comparisons show: the page, its tables, figures and sentences, the terminal, TensorBoard."""
