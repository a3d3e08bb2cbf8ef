#!/bin/sh
# Runs a compiler and keeps what it prints in a file beside the object; shows it only when something
# is wrong.
previous=
for argument; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
"$@" > "$object.ptxas" 2>&1
status=$?
if [ $status -ne 0 ] || grep -q -i 'warning\|error' "$object.ptxas"; then
  grep -v '^ptxas info\|bytes stack frame' "$object.ptxas" >&2
fi
exit $status
