"""What tests, benchmarks and the demo share. Light: importing it loads nothing; import the module you need.

`cases` is the one list of inputs, `placement` takes them to another device; `judge` runs a backend on a case and holds
it against float64. `official_style` is the literal, costly way to compute the loss, with which the numbers, the speed
and the memory of everything else are compared; `step` sets up a training step of either. `peak` measures memory,
`precision` keeps float32 whole, `environment` describes the machine.
"""
