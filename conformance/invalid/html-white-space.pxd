
	 <html>