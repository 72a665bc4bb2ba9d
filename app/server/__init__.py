"""The process that listens: one server or several workers, with limits on connections."""
