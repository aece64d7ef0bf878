"""What tests, benchmarks and the demo share. Light: importing it loads nothing; import the module you need.

`cases` is the one list of inputs; `official_style` is the literal, costly way to compute the loss, with which
the numbers, the speed and the memory of everything else are compared. `peak` measures memory, `environment` describes
the machine.
"""
