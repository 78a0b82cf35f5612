"""A pair of student and teacher, measured before anything is trained. Knows no trainer."""
