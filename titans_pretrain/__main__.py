import sys

from titans_pretrain.cli import main

sys.exit(main())
