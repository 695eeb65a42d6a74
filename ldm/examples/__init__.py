"""Example data: captioned shapes with an exact alignment measure, and emoji captions."""
