"""Does one service answer as another does? Asking, comparing, judging, explaining, reporting."""
