"""From the scores of a row to the limit that selected inputs reach: one file a selector."""
