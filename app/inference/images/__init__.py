"""Image files to pixels: the estimated cost of decoding, every format and layout, and the conversion to sRGB."""
