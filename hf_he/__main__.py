from hf_he.cli import main

main()
