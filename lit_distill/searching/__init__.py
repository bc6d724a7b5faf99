"""Students of a budget, ranked without training and by shared weights."""
