"""From the scores of a row to the experts that it runs through: one file a selector."""
