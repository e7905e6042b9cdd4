"""What every other file may use: errors of one line, safe writing of files, devices, command lines, the terminal."""
