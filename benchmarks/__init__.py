"""fimkit beside other libraries and beside what the machine allows: ``python -m benchmarks``."""
