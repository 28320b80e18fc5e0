"""This library's side of each number, one program each."""
