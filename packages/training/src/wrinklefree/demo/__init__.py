"""The parts of `wrinklefree demo`; the demo itself, on one page, is `wrinklefree.commands.demo`."""
