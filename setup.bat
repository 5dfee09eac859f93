@echo off
rem Makes .venv with Python 3.11 and installs the locked requirements; a second run installs nothing.
rem   setup.bat          what training needs
rem   setup.bat --dev    and what the tests need
rem set PYTHON=C:\path\to\python.exe before it takes that interpreter.
setlocal
cd /d "%~dp0"

if defined PYTHON call :try "%PYTHON%" && goto install
if exist ".venv\Scripts\python.exe" call :try ".venv\Scripts\python.exe" && goto install
call :try py -3.11 && goto install
call :try python3.11 && goto install
call :try python && goto install
echo setup.bat: Python 3.11 was not found (looked for py -3.11, python3.11 and python on the PATH). 1>&2
echo Install it, or name it: set PYTHON=C:\path\to\python.exe 1>&2
exit /b 1

:install
%FOUND% .ci\install.py %*
exit /b %ERRORLEVEL%

:try
set FOUND=%*
%* -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" >nul 2>&1
exit /b %ERRORLEVEL%
