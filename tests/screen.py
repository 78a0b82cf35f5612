"""A terminal of 80 columns, as far as progress bars use it."""

import io
import re

_PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal(io.StringIO):
    """Says that it is a terminal and shows what stands on its screen."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def lines(self):
        rows, row, column = [""], 0, 0
        for number, command, move, text in _PIECES.findall(self.getvalue()):
            if command == "A":
                row = max(0, row - int(number or 1))
            elif command == "K":
                rows[row] = "" if number == "2" else rows[row][:column]
            elif move == "\r":
                column = 0
            elif move == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif text:
                rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in rows if line.strip()]
