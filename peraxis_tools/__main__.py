"""`python -m peraxis_tools`: the command line if scripts are not on the path."""

from peraxis_tools.entry import main

main()
