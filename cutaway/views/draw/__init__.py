"""Media: pictures as figures, as HTML with SVG, and in a terminal."""
