"""One input format per module; `documents.FORMATS` lists them."""
