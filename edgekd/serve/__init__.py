"""An artifact behind HTTP, by OpenAI's interface: ``edgekd serve``."""
