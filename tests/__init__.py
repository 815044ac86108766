"""The tests of fimkit."""
